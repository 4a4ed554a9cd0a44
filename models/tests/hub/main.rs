//! Laws of fetching from the hub, against a server on the loopback: ranges, redirects, hashes, broken connections.

mod server;

use nibble_models::hub::{self, HubEvent, HubOptions};
use nibble_models::{ModelError, Result};
use server::{Behaviour, COMMIT, REPO, Server, content, etag};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

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

#[test]
fn a_hub_says_whether_it_is_there_and_whose_the_token_is() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let patience = std::time::Duration::from_secs(20);
    let options = server.options(cache.path());
    assert_eq!(hub::greet(&options, patience).unwrap(), None);
    server.state.lock().unwrap().token = Some("secret");
    let with = |token: &str| HubOptions { token: Some(token.to_owned()), ..options.clone() };
    assert_eq!(hub::greet(&with("secret"), patience).unwrap().as_deref(), Some("somebody"));
    let refused = hub::greet(&with("other"), patience).unwrap_err().to_string();
    assert!(refused.contains("the token is refused (401)") && !refused.contains("other"), "{refused}");
    let nobody = HubOptions { endpoint: "http://127.0.0.1:1".into(), ..options };
    assert!(hub::greet(&nobody, patience).unwrap_err().to_string().contains("127.0.0.1:1"));
}
