//! A transfer from the hub, stopped in the middle.

use crate::interrupt::signal;
use crate::support::{Place, finish};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

/// A hub that serves a folder's files under the hashes of its manifest, and falls silent halfway through the weights.
struct Hub {
    place: std::path::PathBuf,
    silent: AtomicBool,
    /// Where the last transfer of the weights began.
    from: AtomicU64,
}

impl Hub {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let (mut path, mut from) = (String::new(), 0usize);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 || line == "\r\n" {
                break;
            }
            let lower = line.to_ascii_lowercase();
            if path.is_empty() {
                path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            } else if let Some(range) = lower.strip_prefix("range: bytes=") {
                from = range.split('-').next().and_then(|n| n.trim().parse().ok()).unwrap_or(0);
            }
        }
        let manifest: Value = serde_json::from_slice(&std::fs::read(self.place.join("manifest.json"))?)?;
        let files = manifest["files"].as_object().unwrap();
        if path.starts_with("/api/") {
            let siblings: Vec<Value> = files.keys().map(|name| json!({"rfilename": name})).collect();
            let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        let bytes = std::fs::read(self.place.join(name))?;
        let etag = files[name]["sha256"].as_str().unwrap();
        let (len, rest) = (bytes.len(), &bytes[from..]);
        let status = match from {
            0 => "200 OK".to_owned(),
            _ => format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{len}", len - 1),
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nETag: \"{etag}\"\r\nContent-Length: {}\r\n\r\n",
            rest.len()
        )?;
        if name != WEIGHTS {
            return stream.write_all(rest);
        }
        self.from.store(from as u64, Ordering::SeqCst);
        stream.write_all(&rest[..rest.len() / 2])?;
        while self.silent.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        stream.write_all(&rest[rest.len() / 2..])
    }
}

/// Length of the transfer's part, if there is one.
fn part(cache: &Path) -> Option<u64> {
    let blobs = std::fs::read_dir(cache.join("hub/models--org--tiny/blobs")).ok()?;
    let mut parts = blobs.flatten().filter(|e| e.file_name().to_string_lossy().ends_with(".incomplete"));
    parts.next().map(|e| e.metadata().map_or(0, |m| m.len()))
}

#[test]
fn a_transfer_that_stalls_is_ended_by_one_interrupt_and_goes_on_where_it_was() {
    let place = Place::new();
    place.model("float", &["--hidden", "256", "--ffn", "512"]);
    place.run(&["quantize", "float", "-o", "int8", "--scheme", "int8-g32"]).ok();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let hub = Arc::new(Hub { place: place.path("int8"), silent: AtomicBool::new(true), from: AtomicU64::new(0) });
    let serving = Arc::clone(&hub);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let hub = Arc::clone(&serving);
            // The client goes away in the middle: that is what this is about.
            std::thread::spawn(move || drop(hub.answer(stream)));
        }
    });
    let fetch = || {
        let mut command = place.command(&["verify", "org/tiny", "--json"]);
        command.env("HF_ENDPOINT", &endpoint).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let whole = std::fs::metadata(place.path("int8").join(WEIGHTS)).unwrap().len();
    let (mut child, started) = (fetch(), Instant::now());
    while part(&place.path("hub")).is_none_or(|len| len < whole / 2) {
        assert!(child.try_wait().unwrap().is_none(), "{}", finish(child).stderr);
        assert!(started.elapsed() < Duration::from_secs(60), "no part came: {:?}", part(&place.path("hub")));
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(&child, "INT");
    assert_eq!(finish(child).code, 130);
    assert_eq!(part(&place.path("hub")), Some(whole / 2), "what came is kept");
    let snapshot = place.path("hub").join("hub/models--org--tiny/snapshots").join(COMMIT);
    assert!(!snapshot.join(WEIGHTS).exists(), "a part is not the file");

    hub.silent.store(false, Ordering::SeqCst);
    let found = finish(fetch()).json();
    assert_eq!(found["ok"], true);
    assert_eq!(hub.from.load(Ordering::SeqCst), whole / 2, "it went on where it was");
    assert_eq!(
        std::fs::read(snapshot.join(WEIGHTS)).unwrap(),
        std::fs::read(place.path("int8").join(WEIGHTS)).unwrap()
    );
    assert_eq!(part(&place.path("hub")), None);
}
