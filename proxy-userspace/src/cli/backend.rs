//! `sluice backend`: whom Services lead to.

use clap::{Args, Subcommand};

use super::{
    Failure,
    output::{Target, columns},
};
use crate::inspect::Backend;

/// What to show of backends.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// One line for each backend.
    #[command(after_help = "Examples:\n  sluice backend list\n  sluice backend list --service default/web -o json")]
    List(List),
}

#[derive(Debug, Args)]
struct List {
    /// Only those of a Service: NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let Verb::List(List { service, target }) = &arguments.verb;
    let mut backends = target.inspector()?.backends()?;
    if let Some(service) = service {
        let is_used =
            |name: &String| name.strip_prefix(service.as_str()).is_some_and(|rest| rest.starts_with(['/', ':']));
        backends.retain(|backend| backend.services.iter().any(is_used));
    }
    target.show(&backends, |backends| list(backends))
}

fn list(backends: &[Backend]) -> String {
    let headings = ["BACKEND", "STATE", "WHERE", "ID", "SERVICES"];
    let row = |backend: &Backend| {
        let place = match backend.node {
            _ if backend.is_local => "this node".to_owned(),
            Some(node) => node.to_string(),
            None => "-".to_owned(),
        };
        [
            backend.address.to_string(),
            backend.state.name().to_owned(),
            place,
            backend.id.to_string(),
            backend.services.join(" "),
        ]
    };
    columns(&headings, backends.iter().map(row), "The kernel has no backend.")
}
