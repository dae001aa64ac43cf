//! The log of the agent: on standard error, as text for people or as JSON for machines.

use std::{env, ffi::OsStr, io::IsTerminal as _, num::ParseIntError, str::FromStr};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// A line of words.
    #[default]
    Text,
    /// A line of JSON.
    Json,
}

/// One `-v`, or `-v=N` as kube-proxy has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verbosity {
    /// One level more.
    More,
    /// This many levels.
    Level(u8),
}

impl Verbosity {
    /// What follows kube-proxy's `-v`: up to 2 is what it usually runs with, and 4 is for debugging.
    pub(super) fn of_kube_proxy(number: u32) -> Self {
        Self::Level(match number {
            0..=2 => 0,
            3 | 4 => 1,
            5 | 6 => 2,
            _ => 3,
        })
    }

    /// The level it is by itself.
    pub(super) fn level(self) -> u8 {
        match self {
            Self::More => 1,
            Self::Level(level) => level,
        }
    }

    /// The level all of them together ask for.
    pub(super) fn sum(all: &[Self]) -> u8 {
        all.iter().fold(0, |sum: u8, one| sum.saturating_add(one.level()))
    }
}

impl FromStr for Verbosity {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        if text == "more" { Ok(Self::More) } else { Ok(Self::of_kube_proxy(text.parse()?)) }
    }
}

/// Starts the log. `RUST_LOG` decides before the number of `-v`.
pub(super) fn start(format: LogFormat, verbosity: u8) {
    let level = match verbosity {
        0 => "info",
        1 => "info,proxy_userspace=debug",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(verbosity > 0);
    let is_coloured = is_coloured(std::io::stderr().is_terminal(), env::var_os("NO_COLOR").as_deref());
    let log = log.with_writer(std::io::stderr).with_ansi(is_coloured);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Whether the log has colours: for people, unless they have set `NO_COLOR` to anything (<https://no-color.org>).
fn is_coloured(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::is_coloured;

    #[test]
    fn colours_are_for_terminals_whose_owner_has_nothing_against_them() {
        let cases = [
            ("a terminal", true, None, true),
            ("a file", false, None, false),
            ("a terminal without colours", true, Some("1"), false),
            ("any value counts", true, Some("0"), false),
            ("an empty one does not", true, Some(""), true),
            ("a file without colours", false, Some("1"), false),
        ];
        for (name, is_terminal, no_color, expected) in cases {
            assert_eq!(is_coloured(is_terminal, no_color.map(OsStr::new)), expected, "{name}");
        }
    }
}
