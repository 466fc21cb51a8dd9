//! PEM files and what is made of them: read again and again, as those who renew certificates replace files. What was made
//! of the last good ones stays in use.

use std::{path::PathBuf, sync::Arc};

use parking_lot::RwLock;

use super::TlsError;

/// What the files hold. An empty path is an empty file.
pub(super) type Contents = [Vec<u8>; 3];
/// Of each file the setting that names it, and its path.
pub(super) type Paths = [(&'static str, PathBuf); 3];
type Make<T> = dyn Fn(&Contents) -> Result<T, TlsError> + Send + Sync;

/// See the module.
pub(super) struct Followed<T> {
    paths: Paths,
    make: Box<Make<T>>,
    current: RwLock<(Contents, Arc<T>)>,
}

impl<T> Followed<T> {
    /// Errors name the setting and the file.
    pub(super) fn read(
        paths: Paths,
        make: impl Fn(&Contents) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let contents = contents(&paths)?;
        let made = Arc::new(make(&contents)?);
        Ok(Self { paths, make: Box::new(make), current: RwLock::new((contents, made)) })
    }

    pub(super) fn current(&self) -> Arc<T> {
        self.current.read().1.clone()
    }

    /// Reads the files again; what is made of them, if they have changed. An error changes nothing. Blocks.
    pub(super) fn refresh(&self) -> Result<Option<Arc<T>>, TlsError> {
        let contents = contents(&self.paths)?;
        if contents == self.current.read().0 {
            return Ok(None);
        }
        let made = Arc::new((self.make)(&contents)?);
        *self.current.write() = (contents, made.clone());
        Ok(Some(made))
    }
}

fn contents(paths: &Paths) -> Result<Contents, TlsError> {
    let mut contents = Contents::default();
    for ((key, path), content) in paths.iter().zip(&mut contents) {
        if !path.as_os_str().is_empty() {
            let read = std::fs::read(path);
            *content = read.map_err(|source| TlsError::Read { key, path: path.clone(), source })?;
        }
    }
    Ok(contents)
}
