//! `completion`: what a shell needs to complete `baton`'s commands.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::screen::say;

#[derive(Debug, Clone, clap::Args)]
pub(super) struct CompletionArgs {
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &CompletionArgs) {
    say(script(args.shell).trim_end());
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::Args::command(), "baton", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_learn_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for verb in ["uncordon", "set-targets", "rebalance"] {
                assert!(script.contains(verb), "{verb} for {shell}");
            }
        }
    }
}
