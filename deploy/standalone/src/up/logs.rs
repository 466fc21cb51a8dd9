//! What a child writes: kept in a file of bounded size, shown on the terminal if asked for, and remembered as far as a
//! report of its death needs it.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::screen::Screen;

/// A file that has grown to this is kept once as `<name>.log.1` and begun anew.
const FILE_BYTES: u64 = 16 << 20;
/// Of one line, what is shown and remembered; the file has all of it.
const LINE_BYTES: usize = 4096;

/// The log of one supervised process, over all its lives.
#[derive(Debug)]
pub(super) struct Log {
    name: String,
    path: PathBuf,
    file: File,
    bytes: u64,
    show: Option<Screen>,
    last: Last,
    line: Vec<u8>,
}

/// The line that tells best why a process died: its last `error: ...`, or else the last one.
#[derive(Debug, Clone, Default)]
pub(super) struct Last(Arc<Mutex<(Option<String>, String)>>);

impl Last {
    fn heard(&self, line: &str) {
        // A poisoned lock holds two strings that are still two strings.
        let mut last = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(error) = line.strip_prefix("error: ") {
            last.0 = Some(error.to_owned());
        }
        line.clone_into(&mut last.1);
    }

    /// What there is to say of the life that ended; forgets it, for the next one.
    pub(super) fn take(&self) -> Words {
        let mut last = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (error, line) = std::mem::take(&mut *last);
        match error {
            Some(error) => Words::Error(error),
            None if line.is_empty() => Words::Nothing,
            None => Words::Line(line),
        }
    }
}

/// The last words of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Words {
    /// It said why it ended.
    Error(String),
    /// It wrote this last; whether that has to do with its end is open.
    Line(String),
    Nothing,
}

impl Log {
    /// Begins the file anew. With `show`, every line goes to the terminal too, under the process's name.
    pub(super) fn create(directory: &Path, name: &str, show: Option<Screen>) -> io::Result<Self> {
        let path = directory.join(format!("{name}.log"));
        let file = File::create(&path)?;
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            bytes: 0,
            show,
            last: Last::default(),
            line: Vec::new(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn last(&self) -> Last {
        self.last.clone()
    }

    /// Takes in what comes through the pipe until its other end is closed.
    pub(super) async fn follow(&mut self, pipe: OwnedFd) -> io::Result<()> {
        let mut pipe = pipe::Receiver::from_owned_fd(pipe)?;
        let mut buffer = vec![0; 16 << 10];
        loop {
            match pipe.read(&mut buffer).await? {
                0 => break,
                read => self.take_in(&buffer[..read]),
            }
        }
        self.end_line();
        Ok(())
    }

    fn take_in(&mut self, bytes: &[u8]) {
        // A full disk must not stop the process whose log it is; what is lost is lost.
        let _ = self.keep(bytes);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = LINE_BYTES.saturating_sub(self.line.len());
            let text = piece.strip_suffix(b"\n").unwrap_or(piece);
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes >= FILE_BYTES {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
            self.file = File::create(&self.path)?;
            self.bytes = 0;
        }
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    fn end_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        if let Some(screen) = &self.show {
            screen.line(&format!("{:<12}| {line}", self.name));
        }
        self.last.heard(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_and_the_telling_one_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::create(directory.path(), "x", None).unwrap();
        assert_eq!(log.last().take(), Words::Nothing);
        for bytes in ["one\ner", "ror: bad model\n", "last"] {
            log.take_in(bytes.as_bytes());
        }
        log.end_line();
        assert_eq!(log.last().take(), Words::Error("bad model".to_owned()));
        log.take_in(b"a plain line\n");
        assert_eq!(log.last().take(), Words::Line("a plain line".to_owned()));
        let kept = fs::read_to_string(directory.path().join("x.log")).unwrap();
        assert_eq!(kept, "one\nerror: bad model\nlasta plain line\n");
    }

    #[test]
    fn a_file_is_bounded_and_the_one_before_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::create(directory.path(), "x", None).unwrap();
        log.take_in(&vec![b'a'; FILE_BYTES as usize]);
        log.take_in(b"new\n");
        assert_eq!(fs::read_to_string(directory.path().join("x.log")).unwrap(), "new\n");
        assert_eq!(fs::metadata(directory.path().join("x.log.1")).unwrap().len(), FILE_BYTES);
        let Words::Line(line) = log.last().take() else { panic!("a line was written") };
        assert!(line.len() <= LINE_BYTES);
    }
}
