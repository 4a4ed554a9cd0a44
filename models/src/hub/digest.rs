//! The two hashes that the hub names files by.

use sha1::{Digest, Sha1};
use sha2::Sha256;

/// A hash in the making, of the kind that a file's ETag is.
#[derive(Debug, Clone)]
pub(super) enum Hasher {
    /// Large files: sha256 of the content.
    Sha256(Sha256),
    /// Small files: git's sha1 of `blob SIZE\0` and the content.
    Git(Sha1),
}

impl Hasher {
    /// The hasher for an ETag; `None` where it is neither kind of hash.
    pub(super) fn for_etag(etag: &str, bytes: u64) -> Option<Self> {
        let hex = etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match (hex, etag.len()) {
            (true, 64) => Some(Self::Sha256(Sha256::new())),
            (true, 40) => Some(Self::Git(Sha1::new_with_prefix(format!("blob {bytes}\0")))),
            _ => None,
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(h) => h.update(bytes),
            Self::Git(h) => h.update(bytes),
        }
    }

    /// The hash in hexadecimal digits.
    pub(super) fn finish(self) -> String {
        let bytes = match self {
            Self::Sha256(h) => h.finalize().to_vec(),
            Self::Git(h) => h.finalize().to_vec(),
        };
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let of = |etag: &str| {
            let mut hasher = Hasher::for_etag(etag, 6).unwrap();
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            hasher.finish()
        };
        // printf 'hello\n' | git hash-object --stdin; printf 'hello\n' | sha256sum
        assert_eq!(of(&"0".repeat(40)), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(of(&"0".repeat(64)), "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
        assert!(["", "abc", "../../etc/passwd", &"g".repeat(40)].iter().all(|e| Hasher::for_etag(e, 6).is_none()));
    }
}
