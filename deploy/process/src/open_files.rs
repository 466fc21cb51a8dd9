//! How many files, and with them connections, a process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets the process have as many as it may let itself have: shells and container engines begin with 1,024.
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // What there was stays then, and `most` tells.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// How many there may be; `None`: no limit.
pub fn most() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}
