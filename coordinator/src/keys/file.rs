//! API keys in a file: read at start, and again whenever it changes.
//!
//! What is wrong with a file is told by line and field. At start that is an error; later the keys that are in effect stay
//! until the file is good again, and the log says why. A file that holds no key is wrong, too: it is most likely being
//! written. For the same reason one is read only once it has been the same twice in a row.

use std::{
    collections::HashMap,
    fs::{self, Metadata},
    io,
    num::NonZeroU32,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_process::follow::follow;
use baton_proto::{API_KEYS_MOST, ApiKey, ApiKeyName, Band, KeyHash, KeyLimits, TenantName};
use serde::Deserialize;
use toml::{Spanned, value::Datetime};

use super::{Keys, expiry};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// More than the most keys with the longest of names take.
const FILE_BYTES_MOST: u64 = 8 << 20;

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is larger than {FILE_BYTES_MOST} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("{}, line {line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{} holds no key: expected one table [[keys]] at least", .0.display())]
    Empty(PathBuf),
    #[error("{} holds more than {API_KEYS_MOST} keys", .0.display())]
    TooMany(PathBuf),
}

/// By which a changed file is told from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl From<Metadata> for Stamp {
    fn from(about: Metadata) -> Self {
        Self { inode: about.ino(), bytes: about.len(), changed: (about.mtime(), about.mtime_nsec()) }
    }
}

/// A file of keys as it was last read.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    read: Option<Stamp>,
    /// At the last look.
    seen: Option<Stamp>,
    /// What was in it at start.
    pub(super) keys: Vec<ApiKey>,
}

impl KeyFile {
    /// Reads it for the first time.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        // Before its content, so that a change between the two is seen the next time.
        let stamp = fs::metadata(path).ok().map(Stamp::from);
        let keys = read(path)?;
        Ok(Self { path: path.to_owned(), read: stamp, seen: stamp, keys })
    }

    /// Looks whether it has changed, for as long as this is polled.
    pub(super) async fn follow(mut self, keys: Arc<Keys>) {
        let file = self.path.display().to_string();
        let told = |found: Result<Vec<ApiKey>, KeyFileError>| match found {
            Ok(found) => {
                tracing::info!(keys = found.len(), %file, "API keys were read again");
                keys.replace(found);
            }
            Err(error) => {
                tracing::error!(%error, "the API keys that are in effect stay: see to their file");
                keys.not_renewed();
            }
        };
        follow(LOOK_EVERY, move || self.look(), told).await;
    }

    /// The new content, if there is any.
    fn look(&mut self) -> Result<Option<Vec<ApiKey>>, KeyFileError> {
        let stamp = fs::metadata(&self.path).ok().map(Stamp::from);
        let settled = std::mem::replace(&mut self.seen, stamp) == stamp;
        if !settled || stamp == self.read {
            return Ok(None);
        }
        self.read = stamp;
        read(&self.path).map(Some)
    }
}

fn read(path: &Path) -> Result<Vec<ApiKey>, KeyFileError> {
    let unreadable = |source| KeyFileError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(unreadable)?.len() > FILE_BYTES_MOST {
        return Err(KeyFileError::TooLarge(path.to_owned()));
    }
    parse(&fs::read_to_string(path).map_err(unreadable)?, path)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tables {
    #[serde(default)]
    keys: Vec<Spanned<Entry>>,
}

/// A key as it is written down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    /// None = as the key is called.
    tenant: Option<String>,
    sha256: String,
    #[serde(default)]
    requests_per_minute: u32,
    #[serde(default)]
    tokens_per_minute: u32,
    #[serde(default)]
    concurrent: u32,
    #[serde(default)]
    band: Band,
    #[serde(default = "weight")]
    weight: u32,
    expires: Option<Datetime>,
}

fn weight() -> u32 {
    ApiKey::WEIGHT.get()
}

fn parse(text: &str, path: &Path) -> Result<Vec<ApiKey>, KeyFileError> {
    let at = |offset: usize, problem: String| {
        let line = text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1;
        KeyFileError::Line { path: path.to_owned(), line, problem }
    };
    let tables: Tables = toml::from_str(text)
        .map_err(|error| at(error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
    match tables.keys.len() {
        0 => return Err(KeyFileError::Empty(path.to_owned())),
        1..=API_KEYS_MOST => {}
        _ => return Err(KeyFileError::TooMany(path.to_owned())),
    }
    let (mut keys, mut names, mut hashes) = (Vec::new(), HashMap::new(), HashMap::new());
    for (index, entry) in tables.keys.into_iter().enumerate() {
        let offset = entry.span().start;
        let wrong = |field: &str, problem: String| at(offset, format!("keys[{index}].{field}: {problem}"));
        let key = entry.into_inner().key().map_err(|(field, problem)| wrong(field, problem))?;
        if let Some(first) = names.insert(key.name.clone(), index) {
            return Err(wrong("name", format!("`{}` is the name of keys[{first}], too", key.name)));
        }
        if let Some(first) = hashes.insert(key.hash, index) {
            return Err(wrong("sha256", format!("is that of keys[{first}], too")));
        }
        keys.push(key);
    }
    Ok(keys)
}

/// A file of keys, if the first byte says so, for a fuzz target: what is taken has each name and each hash once.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((5, rest)) = bytes.split_first().map(|(kind, rest)| (kind % 8, rest)) else { return };
    let text = String::from_utf8_lossy(rest);
    match parse(&text, Path::new("keys.toml")) {
        Ok(keys) => {
            let names: std::collections::HashSet<_> = keys.iter().map(|key| &key.name).collect();
            let hashes: std::collections::HashSet<_> = keys.iter().map(|key| key.hash).collect();
            assert!((1..=API_KEYS_MOST).contains(&keys.len()));
            assert_eq!((names.len(), hashes.len()), (keys.len(), keys.len()));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

impl Entry {
    /// Errors name the field; none repeats what stands where a hash belongs, as that may be the key itself.
    fn key(self) -> Result<ApiKey, (&'static str, String)> {
        let limits = KeyLimits {
            requests_per_minute: NonZeroU32::new(self.requests_per_minute),
            tokens_per_minute: NonZeroU32::new(self.tokens_per_minute),
            concurrent: NonZeroU32::new(self.concurrent),
        };
        let name = ApiKeyName::new(self.name).map_err(|error| ("name", error.to_string()))?;
        let tenant = match self.tenant {
            Some(tenant) => TenantName::new(tenant).map_err(|error| ("tenant", error.to_string()))?,
            None => TenantName::from(&name),
        };
        let hash = KeyHash::from_hex(&self.sha256).ok_or((
            "sha256",
            "expected 64 hex digits: the key's SHA-256, as sha256sum prints it".to_owned(),
        ))?;
        let expires = self.expires.map(|expires| {
            let problem = "expected a date, or a time in UTC, as in 2027-01-31 or 2027-01-31T18:00:00Z";
            expiry::unix_seconds(&expires).ok_or(("expires", problem.to_owned()))
        });
        Ok(ApiKey {
            name,
            tenant,
            hash,
            limits,
            band: self.band,
            weight: NonZeroU32::new(self.weight).ok_or(("weight", "expected at least 1".to_owned()))?,
            expires_unix_seconds: expires.transpose()?,
            created_by: String::new(),
            created_unix_millis: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, more: &str) -> String {
        format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{}\"\n{more}\n", KeyHash::of(name).to_hex())
    }

    fn parsed(text: &str) -> Result<Vec<ApiKey>, String> {
        parse(text, Path::new("keys.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_key_has_its_limits_and_what_is_left_out_is_free() {
        let all = "tenant = \"alice\"\nrequests_per_minute = 60\ntokens_per_minute = 1000\nconcurrent = 2\nband = \
                   \"batch\"\nweight = 3\nexpires = 2027-01-31T18:00:00Z";
        let keys = parsed(&(entry("alice-1", all) + &entry("bob", ""))).expect("is good");
        let [alice, bob] = &keys[..] else { panic!("{keys:?}") };
        assert_eq!((alice.tenant.as_str(), alice.band, alice.weight.get()), ("alice", Band::Batch, 3));
        assert_eq!(alice.limits.requests_per_minute.map(NonZeroU32::get), Some(60));
        assert_eq!(alice.limits.tokens_per_minute.map(NonZeroU32::get), Some(1000));
        assert_eq!(alice.limits.concurrent.map(NonZeroU32::get), Some(2));
        assert_eq!(alice.expires_unix_seconds, Some(1_801_418_400));
        assert_eq!(
            (bob.tenant.as_str(), bob.limits, bob.band),
            ("bob", KeyLimits::default(), Band::Standard)
        );
        assert_eq!((bob.hash, bob.expires_unix_seconds), (KeyHash::of("bob"), None));
    }

    #[test]
    fn what_is_wrong_is_told_by_line_and_field_without_what_may_be_a_key() {
        let secret = "sk-baton-0123456789";
        let good = entry("a", "");
        for (bad, said) in [
            (String::new(), "holds no key"),
            (good.clone() + &good, "keys.toml, line 5: keys[1].name: `a` is the name of keys[0]"),
            (good.clone() + &good.replace("\"a\"", "\"b\""), "line 5: keys[1].sha256: is that of keys[0]"),
            (good.clone() + &entry("B", ""), "line 5: keys[1].name"),
            (entry("a", "tenant = \"A b\""), "line 1: keys[0].tenant"),
            (entry("a", "weight = 0"), "line 1: keys[0].weight"),
            (entry("a", "band = \"first\""), "line 4: unknown variant `first`"),
            (entry("a", "requests = 5"), "line 4: unknown field `requests`"),
            (entry("a", "expires = 18:00:00"), "line 1: keys[0].expires"),
            (entry("a", "concurrent = -1"), "line 4: "),
            (
                format!("[[keys]]\nname = \"a\"\nsha256 = \"{secret}\"\n"),
                "line 1: keys[0].sha256: expected 64",
            ),
            ("[[keys]]\nname = \"a\"\n".to_owned(), "line 1: missing field `sha256`"),
            ("[[keys]\n".to_owned(), "line 1: "),
        ] {
            let error = parsed(&bad).expect_err("is bad");
            assert!(error.contains(said) && !error.contains(secret), "{error}; not {said}");
        }
        let many: String = (0..=API_KEYS_MOST).map(|n| entry(&format!("k{n}"), "")).collect();
        assert!(parsed(&many).expect_err("too many").contains("more than 4096 keys"));
    }

    #[test]
    fn a_changed_file_is_read_once_it_has_come_to_rest() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("keys.toml");
        let write = |text: &str| fs::write(&path, text).expect("is written");
        write(&entry("a", ""));
        let mut file = KeyFile::open(&path).expect("a good file");
        let looks = |file: &mut KeyFile| file.look().map(|found| found.map(|keys| keys.len()));
        let nothing = |file: &mut KeyFile| matches!(looks(file), Ok(None));
        assert!(nothing(&mut file) && nothing(&mut file));
        write(&(entry("a", "") + &entry("b", "")));
        assert!(nothing(&mut file), "it may still be being written");
        assert!(matches!(looks(&mut file), Ok(Some(2))));
        assert!(nothing(&mut file));
        write("[[keys]]\n");
        assert!(nothing(&mut file));
        assert!(looks(&mut file).is_err());
        assert!(nothing(&mut file), "it is the same file");
        fs::remove_file(&path).expect("is there");
        assert!(nothing(&mut file));
        assert!(looks(&mut file).expect_err("is gone").to_string().contains("cannot read"));
        assert!(nothing(&mut file));
    }
}
