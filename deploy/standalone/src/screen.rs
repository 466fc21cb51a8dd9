//! What the terminal shows. Lines and progress bars share standard error; results go to standard output. Nobody
//! reading (a closed pipe) is no error of ours.

use std::{
    io::{IsTerminal, Write},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Cheap to clone; all clones draw on the same terminal.
#[derive(Debug, Clone)]
pub(crate) struct Screen {
    bars: MultiProgress,
    terminal: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        Self { bars: MultiProgress::new(), terminal: std::io::stderr().is_terminal() }
    }

    /// A line above the bars.
    pub(crate) fn line(&self, text: &str) {
        if self.terminal {
            // Fails only where nobody looks.
            let _ = self.bars.println(text);
        } else {
            complain(text);
        }
    }

    /// A bar of bytes; without a terminal, a line that says what begins.
    pub(crate) fn bytes(&self, what: &str, total: u64) -> ProgressBar {
        self.bar(what, total, "{prefix:24} {bar:32} {bytes:>10} of {total_bytes:10} {eta:>4}")
    }

    /// A bar of thousandths.
    pub(crate) fn permille(&self, what: &str) -> ProgressBar {
        self.bar(what, 1000, "{prefix:24} {bar:32} {percent:>3}% {msg}")
    }

    fn bar(&self, what: &str, total: u64, template: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(total));
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(what.to_owned());
        if self.terminal {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        bar
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }
}

/// A line on standard error.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Lines on standard output.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Lines on standard output, and whether somebody reads them.
pub(crate) fn say_if_read(text: &str) -> bool {
    writeln!(std::io::stdout(), "{text}").is_ok()
}
