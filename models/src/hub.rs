//! Models from the Hugging Face hub, into the cache that all Hugging Face tools share.
//!
//! ```text
//! HF_HUB_CACHE/models--ORG--NAME/
//!   blobs/ETAG                    content: sha256 of a large file, git's sha1 of a small one
//!   snapshots/COMMIT/config.json  -> ../../blobs/ETAG
//!   refs/main                     COMMIT
//! ```
//!
//! hf-hub's cache layout and names are used as they are. Its transfers check no hash and can't tell a server that ignores
//! a range, so files are fetched here: an interrupted one goes on where it stopped, and a file enters the cache only once
//! its bytes have the hash that is its name.

mod digest;
mod download;
mod http;
mod select;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::error::{ModelError, Result};

use http::Client;

/// Where models come from and where they are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// Address of the hub, without a closing slash.
    pub endpoint: String,
    /// The cache's folder.
    pub cache: PathBuf,
    /// What to prove one's identity with; shown to the endpoint's host only.
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
    /// Pause after a dropped connection; it doubles with each in a row.
    pub retry_pause: Duration,
}

/// What a transfer has to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubEvent<'a> {
    /// A file begins: its name, its size in bytes, and how many of them an earlier transfer has left.
    Start {
        /// Name in the repository.
        file: &'a str,
        /// Whole size in bytes.
        bytes: u64,
        /// Bytes that are there already.
        done: u64,
    },
    /// That many more bytes have come.
    Bytes(u64),
    /// The file is whole and its hash is right.
    Verified {
        /// Name in the repository.
        file: &'a str,
    },
    /// The connection broke; the transfer goes on after a pause.
    Retry {
        /// Name in the repository.
        file: &'a str,
    },
}

impl HubOptions {
    /// Reads the environment as Hugging Face tools do: `HF_ENDPOINT`; `HF_HUB_CACHE`, `HF_HOME`; `HF_TOKEN` or the file
    /// that `hf auth login` writes; `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// No variable names a cache, and there is no home folder to put it in.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// As [`HubOptions::from_env`], with the variables that `lookup` knows.
    ///
    /// # Errors
    /// As [`HubOptions::from_env`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let home = get("HF_HOME").map(PathBuf::from).or_else(|| {
            let caches = get("XDG_CACHE_HOME").map(PathBuf::from);
            caches.or_else(|| Some(PathBuf::from(get("HOME")?).join(".cache"))).map(|c| c.join("huggingface"))
        });
        let cache = match (get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE")), &home) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => home.join("hub"),
            (None, None) => {
                let why = "no folder for the cache; set HF_HOME".to_owned();
                return Err(ModelError::Setting { what: "HF_HOME".to_owned(), why });
            }
        };
        let token_file = get("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home.map(|home| home.join("token")));
        let token = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let text = std::fs::read_to_string(token_file?).ok()?;
            Some(text).filter(|text| !text.trim().is_empty())
        });
        let offline = get("HF_HUB_OFFLINE").or_else(|| get("TRANSFORMERS_OFFLINE"));
        Ok(Self {
            endpoint: get("HF_ENDPOINT")
                .unwrap_or("https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            cache,
            token: token.map(|token| token.trim().to_owned()),
            offline: offline.is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")),
            retry_pause: Duration::from_millis(500),
        })
    }
}

/// Brings a model's checkpoint, configuration and tokenizer into the cache and returns their folder. What is there already
/// isn't fetched again.
///
/// `repo` is `ORG/NAME`, `revision` a branch, a tag or a commit; `main` is the usual one.
///
/// # Errors
/// The names aren't valid; the hub can't be reached or refuses; the repository holds no safetensors checkpoint; a file
/// isn't what its hash says; a file can't be written; offline, the cache lacks a file.
pub fn fetch(options: &HubOptions, repo: &str, revision: &str, progress: &mut dyn FnMut(HubEvent)) -> Result<PathBuf> {
    check_names(repo, revision)?;
    let cache = Cache::new(options.cache.clone());
    let source = Source {
        options,
        client: Client::new(options),
        repo: Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned()),
        name: repo,
        cache,
    };
    if options.offline { source.cached() } else { source.fetch(progress) }
}

/// Asks the hub whether it is there and, if there is a token, whose it is: none without one.
///
/// # Errors
/// No answer within about `patience`, or a refusal: of the token, most likely.
pub fn greet(options: &HubOptions, patience: Duration) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Owner {
        name: String,
    }
    let client = Client::with_patience(options, patience);
    let endpoint = &options.endpoint;
    if options.token.is_none() {
        client.get_small(endpoint, &format!("{endpoint}/api/models?limit=1"))?;
        return Ok(None);
    }
    let answer = client.get_small(endpoint, &format!("{endpoint}/api/whoami-v2"))?;
    let owner: Owner = serde_json::from_slice(&answer)
        .map_err(|e| ModelError::Hub { what: endpoint.clone(), why: format!("/api/whoami-v2: {e}") })?;
    Ok(Some(owner.name))
}

/// The answer to a question about a repository.
#[derive(Debug, Deserialize)]
struct RepoInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file of a repository.
#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// One revision of one repository.
struct Source<'a> {
    options: &'a HubOptions,
    client: Client<'a>,
    repo: Repo,
    name: &'a str,
    cache: Cache,
}

impl Source<'_> {
    fn refuse(&self, why: impl Into<String>) -> ModelError {
        ModelError::Hub { what: self.name.to_owned(), why: why.into() }
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo.clone()).pointer_path(commit)
    }

    /// The snapshot that is in the cache, if it is whole.
    fn cached(&self) -> Result<PathBuf> {
        let revision = self.repo.revision();
        let absent = || self.refuse(format!("revision `{revision}` is not in the cache, and HF_HUB_OFFLINE is set"));
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let refs = self.options.cache.join(self.repo.folder_name()).join("refs").join(revision);
            std::fs::read_to_string(refs).map_err(|_| absent())?.trim().to_owned()
        };
        let folder = self.snapshot(&commit);
        if !is_commit(&commit) || !folder.is_dir() {
            return Err(absent());
        }
        let here = files_below(&folder).map_err(ModelError::io(&folder))?;
        let wanted = select::files(&here, &mut |index| {
            let path = folder.join(index);
            std::fs::read(&path).map_err(ModelError::io(&path))
        });
        match wanted {
            Ok(_) => Ok(folder),
            Err(select::Refusal::Read(e)) => Err(e),
            Err(select::Refusal::Content(why)) => {
                Err(self.refuse(format!("{why}; that is what the cache holds, and HF_HUB_OFFLINE is set")))
            }
        }
    }

    fn fetch(&self, progress: &mut dyn FnMut(HubEvent)) -> Result<PathBuf> {
        let info = self.info()?;
        if !is_commit(&info.sha) {
            return Err(self.refuse(format!("the hub names commit `{}`, wanted 40 hexadecimal digits", info.sha)));
        }
        let folder = self.snapshot(&info.sha);
        let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        let wanted = select::files(&names, &mut |index| {
            let path = self.file(&info.sha, index, progress)?;
            std::fs::read(&path).map_err(ModelError::io(&path))
        });
        let wanted = match wanted {
            Ok(wanted) => wanted,
            Err(select::Refusal::Read(e)) => return Err(e),
            Err(select::Refusal::Content(why)) => return Err(self.refuse(why)),
        };
        for name in &wanted {
            self.file(&info.sha, name, progress)?;
        }
        if !is_commit(self.repo.revision()) {
            let cache = self.cache.repo(self.repo.clone());
            cache.create_ref(&info.sha).map_err(ModelError::io(self.options.cache.join(self.repo.folder_name())))?;
        }
        Ok(folder)
    }

    fn info(&self) -> Result<RepoInfo> {
        let url = format!("{}/api/{}", self.options.endpoint, self.repo.api_url());
        let body = self.client.get_small(self.name, &url)?;
        serde_json::from_slice(&body).map_err(|e| self.refuse(format!("the hub's answer from {url} isn't one: {e}")))
    }

    /// Makes sure that a file of a commit is in the cache.
    fn file(&self, commit: &str, name: &str, progress: &mut dyn FnMut(HubEvent)) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(name);
        if pointer.exists() {
            return Ok(pointer);
        }
        let repo = self.repo.url();
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.options.endpoint, http::escape(name));
        let transfer = download::Transfer { client: &self.client, what: format!("{}/{name}", self.name), name, url };
        let cache = self.cache.repo(self.repo.clone());
        let locks = self.options.cache.join(".locks").join(self.repo.folder_name());
        let blob = transfer.run(|etag| cache.blob_path(etag), &locks, self.options.retry_pause, progress)?;
        download::link(&blob, &pointer)?;
        Ok(pointer)
    }
}

/// A name of the hub: letters, digits, `-`, `_` and `.`, in at most two parts. Anything else could lead out of the cache.
fn check_names(repo: &str, revision: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if repo.split('/').count() > 2 || !repo.split('/').all(plain) {
        return Err(ModelError::Hub {
            what: repo.to_owned(),
            why: "isn't a repository's name, wanted ORG/NAME".to_owned(),
        });
    }
    let sound = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+'))
    };
    if revision.len() > 200 || !revision.split('/').all(sound) {
        let why = format!("`{revision}` isn't a branch, a tag or a commit");
        return Err(ModelError::Hub { what: repo.to_owned(), why });
    }
    Ok(())
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Every file of a folder that is there, links followed, with names as in the repository.
fn files_below(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    let mut folders = vec![(folder.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let path = entry.path();
            if path.is_dir() {
                folders.push((path, format!("{name}/")));
            } else if path.exists() {
                names.push(name);
            }
        }
    }
    Ok(names)
}
