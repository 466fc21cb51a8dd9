//! Where a model's files may lie: whatever a path or the links on it say, nothing is read from elsewhere.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use crate::CheckpointError;

/// Most bytes of a file that is read whole: far above any real one; a tokenizer.json of 30 MB is the largest seen.
const MOST_BYTES: u64 = 256 << 20;

/// A directory, links on the way to it followed, or anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelRoot(Option<PathBuf>);

impl ModelRoot {
    /// Files are read wherever they lie.
    pub fn anywhere() -> Self {
        Self(None)
    }

    /// `directory` and what lies under it; an empty path = anywhere.
    ///
    /// # Errors
    /// If there is no such directory.
    pub fn at(directory: &Path) -> Result<Self, CheckpointError> {
        if directory.as_os_str().is_empty() {
            return Ok(Self::anywhere());
        }
        let io = |source| CheckpointError::Io { path: directory.to_owned(), source };
        let whole = directory.canonicalize().map_err(io)?;
        if !whole.is_dir() {
            return Err(io(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self(Some(whole)))
    }

    /// Opens a file for reading. What is asked is where the file lies that was opened, not where its path led before: that may
    /// change in between.
    pub(crate) fn open(&self, path: &Path) -> Result<File, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        // To open a pipe otherwise waits for somebody who writes.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let Some(root) = &self.0 else { return Ok(file) };
        let lies_at = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(io)?;
        if lies_at.starts_with(root) {
            return Ok(file);
        }
        Err(CheckpointError::Outside { path: path.to_owned(), lies_at, root: root.clone() })
    }

    /// The whole of a file.
    pub(crate) fn read(&self, path: &Path) -> Result<Vec<u8>, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let file = self.open(path)?;
        let length = file.metadata().map_err(io)?.len();
        let mut content = Vec::new();
        file.take(MOST_BYTES + 1).read_to_end(&mut content).map_err(io)?;
        if content.len() as u64 > MOST_BYTES {
            return Err(CheckpointError::Damaged {
                path: path.to_owned(),
                field: "its size".to_owned(),
                reason: format!("{length} bytes are too many for such a file"),
            });
        }
        Ok(content)
    }
}

/// A file under a [`ModelRoot`], to be read when it is needed.
#[derive(Debug, Clone)]
pub struct RootedFile {
    root: ModelRoot,
    path: PathBuf,
}

impl RootedFile {
    pub(crate) fn new(root: &ModelRoot, path: PathBuf) -> Self {
        Self { root: root.clone(), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole of it.
    pub fn read(&self) -> Result<Vec<u8>, CheckpointError> {
        self.root.read(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_lies_under_the_root_is_read_and_nothing_else() {
        let place = tempfile::tempdir().expect("a directory");
        let at = |name: &str| place.path().join(name);
        for directory in ["models/m", "models-too", "elsewhere"] {
            fs::create_dir_all(at(directory)).expect("a directory");
        }
        for file in ["models/m/a", "models/blob", "models-too/a", "elsewhere/secret"] {
            fs::write(at(file), file).expect("a file");
        }
        symlink("../blob", at("models/m/inward")).expect("a link");
        symlink(at("models/blob"), at("models/m/inward-too")).expect("a link");
        symlink(at("elsewhere/secret"), at("models/m/outward")).expect("a link");
        symlink(at("elsewhere"), at("models/away")).expect("a link");
        symlink("models", at("by-another-name")).expect("a link");

        for root in ["models", "by-another-name"] {
            let root = ModelRoot::at(&at(root)).expect("a directory");
            let read =
                |name: &str| root.read(&at(name)).map(|content| String::from_utf8(content).expect("text"));
            assert_eq!(read("models/m/a").expect("it is under the root"), "models/m/a");
            assert_eq!(read("by-another-name/m/a").expect("it is under the root"), "models/m/a");
            for inward in ["models/m/inward", "models/m/inward-too"] {
                assert_eq!(read(inward).expect("its link leads there"), "models/blob");
            }
            for outward in
                ["models/m/outward", "models/away/secret", "models/../elsewhere/secret", "models-too/a"]
            {
                let error = read(outward).expect_err("it lies elsewhere");
                assert!(matches!(error, CheckpointError::Outside { .. }), "{outward}: {error}");
            }
        }
        assert!(ModelRoot::anywhere().read(&at("models/m/outward")).is_ok());
        let made =
            std::process::Command::new("mkfifo").arg(at("models/pipe")).status().expect("mkfifo starts");
        assert!(made.success());
        for (root, other) in [("models", "models/pipe"), ("models", "models/m"), ("", "models/pipe")] {
            let root =
                if root.is_empty() { ModelRoot::anywhere() } else { ModelRoot::at(&at(root)).expect("one") };
            let error = root.read(&at(other)).expect_err("it is no file").to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
        assert!(ModelRoot::at(&at("models/m/a")).is_err(), "a file is no root");
        let text = ModelRoot::at(&at("models")).expect("a directory").read(&at("models/m/outward"));
        let text = text.expect_err("it lies elsewhere").to_string();
        assert!(text.contains("models/m/outward lies at") && text.contains("elsewhere/secret"), "{text}");
    }
}
