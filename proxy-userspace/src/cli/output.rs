//! How commands show what they found: as a table for people, or as JSON and YAML whose fields stay what they are.

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
};

use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::Failure;
use crate::inspect::{self, InspectError, Inspector};

/// Where to look, and how to show it.
#[derive(Clone, Debug, Args)]
pub(super) struct Target {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pub(super) pin_path: PathBuf,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Format,
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people. May change.
    #[default]
    Table,
    /// For programs. Fields are added, and stay what they are.
    Json,
    /// The same as YAML.
    Yaml,
}

impl Target {
    /// Opens the maps.
    pub(super) fn inspector(&self) -> Result<Inspector, Failure> {
        Ok(Inspector::open(&self.pin_path)?)
    }

    /// Says so, on standard error, where an agent keeps the maps that is in another network namespace than this command, which looks
    /// at the devices and addresses of its own.
    pub(super) fn warn_of_another_network(&self) {
        let Some(agent) = inspect::agent_at_work(&self.pin_path) else { return };
        let process = agent.pid.to_string();
        let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let (own, agents) = (network("self"), network(&process));
        if agents.is_some() && own != agents {
            eprintln!(
                "sluice: the agent is in another network namespace, and this command looks at the devices and addresses of its own: \
                 run it by `nsenter --net=/proc/{process}/ns/net`"
            );
        }
    }

    /// Shows an answer.
    pub(super) fn show<T: Serialize>(&self, answer: &T, table: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let text = match self.output {
            Format::Table => table(answer),
            Format::Json => serde_json::to_string_pretty(answer).map_err(|error| Failure::new(error, 1))?,
            Format::Yaml => serde_saphyr::to_string(answer).map_err(|error| Failure::new(error, 1))?,
        };
        print(&text)
    }
}

impl From<InspectError> for Failure {
    fn from(error: InspectError) -> Self {
        let code = error.exit_code();
        Self::new(error, code)
    }
}

/// Writes text to standard output. Whoever reads it may have seen enough.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(error, 1)),
        _ => Ok(()),
    }
}

/// Columns with a heading each, as kubectl has them; a sentence where there are no rows.
pub(super) fn columns<R>(headings: &[&str], rows: impl IntoIterator<Item = R>, nothing: &str) -> String
where
    R: IntoIterator<Item = String>,
{
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headings.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    if table.is_empty() {
        return nothing.to_owned();
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// Seconds as people say them: `12s`, `5m`, `3h`, `2d`.
pub(super) fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Yes or no.
pub(super) fn word(is_so: bool) -> String {
    if is_so { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{ago, columns};

    #[test]
    fn times_are_told_in_the_unit_that_matters() {
        let cases = [(0, "0s"), (119, "119s"), (120, "2m"), (7_199, "119m"), (7_200, "2h"), (172_800, "2d")];
        for (seconds, expected) in cases {
            assert_eq!(ago(seconds), expected);
        }
    }

    #[test]
    fn columns_stand_under_their_headings_and_nothing_is_said_in_words() {
        let rows = [["a".to_owned(), "10".to_owned()], ["bcd".to_owned(), "2".to_owned()]];
        assert_eq!(columns(&["NAME", "COUNT"], rows, ""), "NAME   COUNT\na      10\nbcd    2\n");
        assert_eq!(columns(&["NAME"], Vec::<[String; 1]>::new(), "There is none."), "There is none.");
    }
}
