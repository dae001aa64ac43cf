//! The log of the agent: on standard error, as text for people or as JSON for machines.

use std::io::IsTerminal as _;

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
    let log = log.with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
