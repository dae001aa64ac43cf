//! Programs of the node that know how to change what netlink has no words for here.

use std::{
    io::{self, Write as _},
    process::{Command, Output, Stdio},
};

/// Why a program has not done what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(super) enum ToolError {
    /// There is none.
    #[error("there is no {0} here")]
    Missing(String),
    /// It cannot be run.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Its name.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It says no.
    #[error("{command}: {reason}")]
    Refused {
        /// With its arguments.
        command: String,
        /// What it said.
        reason: String,
    },
}

/// Runs a program on an input: what it prints.
pub(super) fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ToolError::Missing(program.to_owned()),
        _ => ToolError::Run { program: program.to_owned(), source },
    };
    let output = feed(program, arguments, input).map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let reason = if said.trim().is_empty() { output.status.to_string() } else { said.trim().replace('\n', "; ") };
    Err(ToolError::Refused { command: [&[program], arguments].concat().join(" "), reason })
}

fn feed(program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // One that does not read what it is given says why at its end.
    let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    match fed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(output),
    }
}
