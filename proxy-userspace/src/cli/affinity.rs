//! `sluice affinity`: clients that stay with a backend.

use clap::{Args, Subcommand};

use super::{
    Failure,
    output::{Target, ago, columns},
};
use crate::inspect::Affinity;

/// What to show of session affinity.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// One line for each client of a Service port with session affinity.
    #[command(after_help = "Examples:\n  sluice affinity list\n  sluice affinity list --service default/web")]
    List(List),
}

#[derive(Debug, Args)]
struct List {
    /// Only clients of a Service: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    /// Also those that are forgotten with their next connection.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let Verb::List(List { service, all, target }) = &arguments.verb;
    let mut affinities = target.inspector()?.affinities()?;
    affinities.retain(|affinity| *all || !affinity.is_over());
    affinities.retain(|affinity| service.as_ref().is_none_or(|name| affinity.service.is_called(name)));
    target.show(&affinities, |affinities| match service {
        Some(service) if affinities.is_empty() => format!("No client stays with a backend of a Service {service}."),
        _ => list(affinities),
    })
}

fn list(affinities: &[Affinity]) -> String {
    let headings = ["SERVICE", "CLIENT", "BACKEND", "STATE", "IDLE", "TIMEOUT"];
    let row = |affinity: &Affinity| {
        [
            affinity.service.to_string(),
            affinity.client.to_string(),
            affinity.backend.to_string(),
            affinity.state.name().to_owned(),
            ago(affinity.idle_seconds.into()),
            affinity.timeout_seconds.map_or_else(|| "-".to_owned(), |timeout| ago(timeout.into())),
        ]
    };
    columns(&headings, affinities.iter().map(row), "No client stays with a backend.")
}
