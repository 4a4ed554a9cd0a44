//! Laws of fetching from the hub, against a server on the loopback: ranges, redirects, hashes, broken connections.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nibble_models::hub::{self, HubEvent, HubOptions};
use nibble_models::{ModelError, Result};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "org/tiny-model";

/// How the server treats one file.
#[derive(Clone, Default)]
struct Behaviour {
    /// Large files: the endpoint redirects to the store, whose answers have no hash.
    lfs: bool,
    /// Drop the connection after that many bytes of each answer, this many times.
    drops: usize,
    after: usize,
    /// Answer a range with the whole file.
    ignores_ranges: bool,
    /// Answer a range with another one.
    wrong_ranges: bool,
    /// Flip a bit of this byte, this many times.
    corrupt: usize,
    /// Announce another size in `x-linked-size`.
    claims: Option<usize>,
    /// Send no ETag, or this one.
    etag: Option<&'static str>,
    /// Answer with this status and error code.
    refuses: Option<(u16, &'static str)>,
    /// Answer 503 this many times first.
    busy: usize,
}

#[derive(Default)]
struct State {
    files: HashMap<String, (Vec<u8>, Behaviour)>,
    /// What was asked: path, range, whether a token came along.
    log: Vec<(String, Option<String>, bool)>,
    token: Option<&'static str>,
    api: Option<(u16, &'static str)>,
}

/// A hub on a port, and its store on another.
struct Server {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

fn content(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn etag(content: &[u8], lfs: bool) -> String {
    if lfs {
        return hex(&Sha256::digest(content));
    }
    hex(&Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content).finalize())
}

impl Server {
    fn start() -> Self {
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

    fn put(&self, name: &str, content: Vec<u8>, behaviour: Behaviour) {
        self.state.lock().unwrap().files.insert(name.to_owned(), (content, behaviour));
    }

    /// Changes how the weights are served.
    fn weights(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.lock().unwrap().files.get_mut("model.safetensors").unwrap().1);
    }

    fn remove(&self, name: &str) {
        self.state.lock().unwrap().files.remove(name);
    }

    fn file(&self, name: &str) -> Vec<u8> {
        self.state.lock().unwrap().files[name].0.clone()
    }

    /// What was asked since the last call.
    fn log(&self) -> Vec<(String, Option<String>, bool)> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    fn options(&self, cache: &Path) -> HubOptions {
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

fn fetch(options: &HubOptions) -> Result<PathBuf> {
    hub::fetch(options, REPO, "main", &mut |_| {})
}

fn refusal(options: &HubOptions) -> String {
    match fetch(options) {
        Err(error @ ModelError::Hub { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn part_of(cache: &Path, server: &Server) -> PathBuf {
    let name = format!("{}.incomplete", etag(&server.file("model.safetensors"), true));
    cache.join("models--org--tiny-model/blobs").join(name)
}

#[test]
fn a_model_lands_in_the_shared_cache_and_is_not_fetched_twice() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    let mut verified = Vec::new();
    let mut bytes = 0;
    let folder = hub::fetch(&options, REPO, "main", &mut |event| match event {
        HubEvent::Verified { file } => verified.push(file.to_owned()),
        HubEvent::Bytes(n) => bytes += n,
        HubEvent::Start { done, .. } => assert_eq!(done, 0),
        HubEvent::Retry { file } => panic!("{file}"),
    })
    .unwrap();
    assert_eq!(verified, ["config.json", "tokenizer.json", "model.safetensors"]);
    let root = cache.path().join("models--org--tiny-model");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let mut total = 0;
    for name in verified {
        let content = server.file(&name);
        total += content.len() as u64;
        assert_eq!(std::fs::read(folder.join(&name)).unwrap(), content);
        let link = std::fs::read_link(folder.join(&name)).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(etag(&content, name.ends_with("safetensors"))));
    }
    assert_eq!(bytes, total);
    assert!(!folder.join("pytorch_model.bin").exists());

    let asked: Vec<String> = server.log().into_iter().map(|(path, ..)| path).collect();
    assert!(asked.iter().any(|p| p.starts_with("/moved/")) && asked.iter().any(|p| p.ends_with("Signature=secret")));
    assert_eq!(fetch(&options).unwrap(), folder);
    assert_eq!(server.log(), [(format!("/api/models/{REPO}/revision/main"), None, false)]);
    let offline = HubOptions { offline: true, endpoint: "http://127.0.0.1:1".into(), ..options };
    assert_eq!(fetch(&offline).unwrap(), folder);
    assert_eq!(hub::fetch(&offline, REPO, COMMIT, &mut |_| {}).unwrap(), folder);
}

#[test]
fn a_sharded_checkpoint_comes_with_the_files_that_its_index_names() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    server.remove("model.safetensors");
    let index =
        r#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}"#;
    server.put("model.safetensors.index.json", index.into(), Behaviour::default());
    for name in ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"] {
        server.put(name, content(9, 1000), Behaviour { lfs: true, ..Behaviour::default() });
    }
    let folder = fetch(&options).unwrap();
    assert!(folder.join("model-1.safetensors").exists() && folder.join("model-2.safetensors").exists());
    assert!(!folder.join("model-3.safetensors").exists());
    assert_eq!(fetch(&HubOptions { offline: true, ..options.clone() }).unwrap(), folder);

    std::fs::remove_file(folder.join("model-1.safetensors")).unwrap();
    let why = refusal(&HubOptions { offline: true, ..options.clone() });
    assert!(why.contains("model-1.safetensors") && why.contains("HF_HUB_OFFLINE"), "{why}");

    for (bad, part) in [
        (r#"{"weight_map": {"a": "../../evil.safetensors"}}"#, "evil"),
        (r#"{"weight_map": {"a": "model-9.safetensors"}}"#, "model-9"),
        (r#"{"weight_map": {"a": 5}}"#, "`a`"),
        (r#"{}"#, "weight_map"),
        (r#"{"weight"#, "JSON"),
    ] {
        let fresh = tempfile::tempdir().unwrap();
        server.put("model.safetensors.index.json", bad.into(), Behaviour::default());
        let why = refusal(&server.options(fresh.path()));
        assert!(why.contains(part) && why.contains("index"), "{why}");
    }
}

#[test]
fn a_broken_connection_goes_on_where_it_stopped() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.weights(|b| (b.drops, b.after) = (3, 70_000));
    let mut retries = 0;
    let folder = hub::fetch(&server.options(cache.path()), REPO, "main", &mut |event| {
        retries += usize::from(event == HubEvent::Retry { file: "model.safetensors" });
    })
    .unwrap();
    assert_eq!(retries, 3);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), server.file("model.safetensors"));
    let ranges: Vec<String> =
        server.log().into_iter().filter(|(p, ..)| p.contains("Signature")).filter_map(|(_, r, _)| r).collect();
    assert_eq!(ranges, ["bytes=70000-", "bytes=140000-", "bytes=210000-"]);
    assert!(!part_of(cache.path(), &server).exists());
}

#[test]
fn a_transfer_that_gave_up_is_resumed_by_the_next_run() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    server.weights(|b| (b.drops, b.after) = (1, 100_000));
    // The second connection and all that follow bring nothing at all.
    let mut first = true;
    let error = hub::fetch(&options, REPO, "main", &mut |event| {
        if event == (HubEvent::Retry { file: "model.safetensors" }) && std::mem::take(&mut first) {
            server.weights(|b| (b.drops, b.after) = (100, 0));
        }
    });
    let why = error.unwrap_err().to_string();
    assert!(
        why.contains("org/tiny-model/model.safetensors") && why.contains("100000 of 300000 bytes are kept"),
        "{why}"
    );
    assert_eq!(part_of(cache.path(), &server).metadata().unwrap().len(), 100_000);
    assert!(refusal(&HubOptions { offline: true, ..options.clone() }).contains("not in the cache"));

    server.weights(|b| b.drops = 0);
    server.log();
    let mut starts = Vec::new();
    let folder = hub::fetch(&options, REPO, "main", &mut |event| {
        if let HubEvent::Start { file, bytes, done } = event {
            starts.push((file.to_owned(), bytes, done));
        }
    })
    .unwrap();
    assert_eq!(starts, [("model.safetensors".to_owned(), 300_000, 100_000)]);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), server.file("model.safetensors"));
}

#[test]
fn a_server_that_mistakes_the_range_costs_a_fresh_start_and_no_more() {
    for ignores in [true, false] {
        let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
        server.weights(|b| (b.drops, b.after, b.ignores_ranges, b.wrong_ranges) = (1, 50_000, ignores, !ignores));
        let folder = fetch(&server.options(cache.path())).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), server.file("model.safetensors"));
    }
}

#[test]
fn a_corrupted_file_is_named_and_deleted_and_never_enters_the_cache() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    for (name, lfs) in [("tokenizer.json", false), ("model.safetensors", true)] {
        let good = server.file(name);
        server.put(name, good.clone(), Behaviour { lfs, corrupt: 1, ..Behaviour::default() });
        let why = refusal(&options);
        assert!(why.contains(name) && why.contains("corrupt") && why.contains(&etag(&good, lfs)), "{why}");
        let blobs = cache.path().join("models--org--tiny-model/blobs");
        let left: Vec<_> = std::fs::read_dir(blobs).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with(&etag(&good, lfs))), "{left:?}");
    }
    assert!(fetch(&options).is_ok());
}

#[test]
fn a_damaged_beginning_left_by_an_earlier_run_is_found_by_the_hash() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    let part = part_of(cache.path(), &server);
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, vec![0; 1000]).unwrap();
    assert!(refusal(&options).contains("corrupt"));
    std::fs::write(&part, vec![0; 300_001]).unwrap();
    assert!(fetch(&options).is_ok(), "a part longer than the file is begun anew");
}

#[test]
fn a_size_that_is_not_so_is_refused() {
    for (claims, part) in [(200_000, "more than the 200000 bytes"), (400_000, "of 400000 bytes are kept")] {
        let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
        server.weights(|b| b.claims = Some(claims));
        let why = refusal(&server.options(cache.path()));
        assert!(why.contains("model.safetensors") && why.contains(part), "{why}");
    }
}

#[test]
fn a_file_without_a_hash_is_refused() {
    for (etag, part) in [("", "no ETag"), ("../../../evil", "neither a sha256 nor a git hash")] {
        let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
        server.weights(|b| b.etag = Some(etag));
        let why = refusal(&server.options(cache.path()));
        assert!(why.contains(part), "{why}");
    }
}

#[test]
fn refusals_of_the_hub_say_what_helps() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    let with = HubOptions { token: Some("t".into()), ..options.clone() };
    for (status, code, options, parts) in [
        (401, "", &options, ["401", "HF_TOKEN"]),
        (401, "RepoNotFound", &options, ["no such repository", "HF_TOKEN"]),
        (401, "GatedRepo", &options, ["gated", "HF_TOKEN"]),
        (403, "GatedRepo", &with, ["gated", "conditions"]),
        (403, "", &with, ["403", "token in use"]),
        (404, "RepoNotFound", &with, ["no such repository", "token in use"]),
        (404, "RevisionNotFound", &options, ["no such revision", "404"]),
        (418, "", &options, ["418", "/api/models"]),
    ] {
        server.state.lock().unwrap().api = Some((status, code));
        let why = refusal(options);
        assert!(why.starts_with(REPO) && parts.iter().all(|p| why.contains(p)), "{why}");
    }
    server.state.lock().unwrap().api = None;
    server.weights(|b| b.refuses = Some((403, "GatedRepo")));
    let why = refusal(&options);
    assert!(why.contains("model.safetensors") && why.contains("gated"), "{why}");

    let closed = HubOptions { endpoint: "http://127.0.0.1:1".into(), ..options };
    assert!(refusal(&closed).contains("can't reach"));
}

#[test]
fn a_busy_server_is_asked_again() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.weights(|b| b.busy = 2);
    assert!(fetch(&server.options(cache.path())).is_ok());
    let fresh = tempfile::tempdir().unwrap();
    server.weights(|b| b.busy = 1000);
    let why = refusal(&server.options(fresh.path()));
    assert!(why.contains("503") && !why.contains("secret"), "{why}");
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_store() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().token = Some("hf_secret");
    let options = server.options(cache.path());
    assert!(refusal(&options).contains("401"));
    server.log();
    fetch(&HubOptions { token: Some("hf_secret".into()), ..options }).unwrap();
    for (path, _, token) in server.log() {
        assert_eq!(token, !path.contains("Signature"), "{path}");
    }
}

#[test]
fn repositories_that_hold_no_model_say_what_is_missing() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    server.remove("model.safetensors");
    let why = refusal(&options);
    assert!(why.contains("no `model.safetensors`") && why.contains("pytorch_model.bin"), "{why}");
    server.remove("config.json");
    server.put("tiny.Q4_0.gguf", content(5, 10), Behaviour::default());
    let why = refusal(&options);
    assert!(why.contains("no `config.json`") && why.contains("GGUF"), "{why}");
}

#[test]
fn names_that_could_lead_astray_are_refused_before_anything_is_asked() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let options = server.options(cache.path());
    for repo in ["", "a/b/c", "../x", "org/..", "org/", "/x", "org/na me", "org/x--y", "org/-x", "org/x?y", "ö/x"] {
        assert!(hub::fetch(&options, repo, "main", &mut |_| {}).is_err(), "{repo}");
    }
    for revision in ["", "..", "a/../b", "/a", "a b", "a?b", "refs/.hidden"] {
        assert!(hub::fetch(&options, REPO, revision, &mut |_| {}).is_err(), "{revision}");
    }
    assert!(server.log().is_empty());
    assert!(hub::fetch(&options, REPO, "refs/pr/1", &mut |_| {}).is_ok());
    assert_eq!(server.log()[0].0, format!("/api/models/{REPO}/revision/refs%2Fpr%2F1"));
    assert!(cache.path().join("models--org--tiny-model/refs/refs/pr/1").exists());
}

#[test]
fn the_environment_is_read_as_hugging_face_tools_read_it() {
    let read = |pairs: &[(&str, &str)]| {
        let map: HashMap<String, String> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        HubOptions::from_lookup(|name| map.get(name).cloned())
    };
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().to_str().unwrap();
    let plain = read(&[("HOME", "/h")]).unwrap();
    assert_eq!(
        (plain.endpoint.as_str(), plain.cache.as_path()),
        ("https://huggingface.co", Path::new("/h/.cache/huggingface/hub"))
    );
    assert_eq!((plain.token, plain.offline), (None, false));
    let cache = |pairs: &[(&str, &str)]| read(pairs).unwrap().cache;
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
    assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", " ")]), Path::new("/h/.cache/huggingface/hub"));
    assert!(read(&[]).unwrap_err().to_string().contains("HF_HOME"));

    assert_eq!(read(&[("HF_HOME", home), ("HF_TOKEN", " t \n")]).unwrap().token.as_deref(), Some("t"));
    std::fs::write(folder.path().join("token"), "from file\n").unwrap();
    assert_eq!(read(&[("HF_HOME", home)]).unwrap().token.as_deref(), Some("from file"));
    assert_eq!(read(&[("HF_HOME", home), ("HF_TOKEN", "t")]).unwrap().token.as_deref(), Some("t"));
    let other = read(&[("HOME", "/h"), ("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "1")]).unwrap();
    assert_eq!((other.endpoint.as_str(), other.offline), ("http://mirror", true));
    assert!(!read(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
}
