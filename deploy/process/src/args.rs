//! The flags that every Baton service has. A binary flattens them into its own clap parser.

use std::path::PathBuf;

/// Where the configuration comes from, and how the process is watched over.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CommonArgs {
    /// Configuration file (TOML). Environment and flags win over it.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Set one key, as in `--set process.log.level=debug`; wins over file and environment. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", help_heading = "Configuration")]
    pub set: Vec<String>,

    /// Print the configuration in effect, as TOML, and exit.
    #[arg(long, group = "print", help_heading = "Configuration")]
    pub check_config: bool,

    /// Print what can be configured (Markdown): every key, its default, what it means and accepts; and exit.
    #[arg(long, group = "print", help_heading = "Configuration")]
    pub config_reference: bool,

    /// Print the JSON Schema of the configuration file, by which editors complete and check it, and exit.
    #[arg(long, group = "print", help_heading = "Configuration")]
    pub config_schema: bool,

    /// Stop when standard input closes: whoever started this process holds the other end, and so it never outlives
    /// them.
    #[arg(long, help_heading = "Life")]
    pub supervised: bool,
}
