//! Opens Ascend's libraries at run time, so that one binary runs with and without them. A library that is missing is an
//! [`Unavailable`] with its reason: which files were looked for and where.
//!
//! A library is never closed again: its own threads may outlive whoever used it.

use std::{
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Why one of Ascend's interfaces cannot be used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unavailable(Arc<str>);

impl Unavailable {
    pub(crate) fn new(reason: impl Into<Arc<str>>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unavailable: {}", self.0)
    }
}

impl std::error::Error for Unavailable {}

/// Where libraries are looked for.
#[derive(Debug, Clone)]
pub(crate) struct Search {
    /// Whether the dynamic loader's own search comes first.
    loader: bool,
    folders: Vec<PathBuf>,
}

impl Search {
    /// The loader's path, then `$ASCEND_HOME_PATH/lib64`, then where the toolkit is installed by default.
    pub(crate) fn system() -> Self {
        let home = std::env::var_os("ASCEND_HOME_PATH").filter(|home| !home.is_empty());
        let home = home.map(|home| Path::new(&home).join("lib64"));
        let installed = PathBuf::from("/usr/local/Ascend/cann/lib64");
        Self { loader: true, folders: home.into_iter().chain([installed]).collect() }
    }

    /// One folder and nothing else.
    pub(crate) fn only(folder: impl Into<PathBuf>) -> Self {
        Self { loader: false, folders: vec![folder.into()] }
    }

    /// Opens the first of `names` that is found in any place.
    pub(crate) fn open(&self, names: &[&str]) -> Result<Opened, Unavailable> {
        let mut tried = Vec::new();
        for name in names {
            if self.loader {
                match open(OsStr::new(name)) {
                    Ok(library) => return Ok(Opened { library, file: name.into() }),
                    Err(why) => tried.push(format!("on the loader's path ({why})")),
                }
            }
            for folder in &self.folders {
                let file = folder.join(name);
                if !file.exists() {
                    tried.push(format!("{} (no such file)", file.display()));
                    continue;
                }
                match open(file.as_os_str()) {
                    Ok(library) => return Ok(Opened { library, file }),
                    Err(why) => tried.push(format!("{} ({why})", file.display())),
                }
            }
        }
        Err(Unavailable::new(format!("no {}; looked for it {}", names.join(" or "), tried.join(", "))))
    }
}

fn open(name: &OsStr) -> Result<Library, String> {
    // SAFETY: runs the library's initialisers. These are the vendor's libraries, named by constants, from places that
    // only whoever administers the machine or starts this process decides.
    let opened = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
    opened.map_err(|error| cause(&error))
}

/// The loader's own words.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// An open library. Dropping it does not close it.
pub(crate) struct Opened {
    library: Library,
    /// What it was found as.
    pub(crate) file: PathBuf,
}

impl Opened {
    /// A function's address, copied out.
    ///
    /// # Safety
    /// `F` is the type of a function pointer, with the signature that the library's function has.
    pub(crate) unsafe fn function<F: Copy>(&self, name: &str) -> Result<F, Unavailable> {
        // SAFETY: promised by the caller.
        match unsafe { self.library.get::<F>(name) } {
            Ok(symbol) => Ok(*symbol),
            Err(error) => {
                let (file, why) = (self.file.display(), cause(&error));
                Err(Unavailable::new(format!(
                    "{file} has no function {name}, so is too old or too new ({why})"
                )))
            }
        }
    }

    /// Gives the handle up without closing.
    pub(crate) fn keep(self) -> PathBuf {
        std::mem::forget(self.library);
        self.file
    }
}

/// Declares a library's functions as a struct of pointers that is filled when the library is opened. A function after a
/// question mark may be missing.
macro_rules! functions {
    (
        $(#[$about:meta])*
        $table:ident {
            $( $field:ident = $symbol:ident ( $($argument:ty),* $(,)? ) -> $result:ty; )*
            $( ? $extra:ident = $extra_symbol:ident ( $($extra_argument:ty),* $(,)? ) -> $extra_result:ty; )*
        }
    ) => {
        $(#[$about])*
        pub(crate) struct $table {
            $( pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result, )*
            $( pub(crate) $extra: Option<unsafe extern "C" fn($($extra_argument),*) -> $extra_result>, )*
        }

        impl $table {
            fn load(
                library: &$crate::transport::ascend::library::Opened,
            ) -> Result<Self, $crate::transport::ascend::library::Unavailable> {
                // SAFETY: each type is the signature that the library's documents give for the function of that name.
                unsafe {
                    Ok(Self {
                        $( $field: library.function(stringify!($symbol))?, )*
                        $( $extra: library.function(stringify!($extra_symbol)).ok(), )*
                    })
                }
            }
        }
    };
}
pub(crate) use functions;
