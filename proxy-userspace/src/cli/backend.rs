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
    /// Only those of a Service: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let Verb::List(List { service, target }) = &arguments.verb;
    let mut backends = target.inspector()?.backends()?;
    if let Some(service) = service {
        backends.retain(|backend| backend.services.iter().any(|port| is_of(port, service)));
    }
    target.show(&backends, |backends| match service {
        Some(service) if backends.is_empty() => {
            format!("No backend is of a Service {service}: `sluice service list` names those that there are.")
        }
        _ => list(backends),
    })
}

/// Whether somebody means a port, `NAMESPACE/NAME[:PORT]/PROTOCOL`, by such a name of a Service.
fn is_of(port: &str, service: &str) -> bool {
    let port = port.rsplit_once('/').map_or(port, |(port, _protocol)| port);
    let full = port.split(':').next().unwrap_or(port);
    let name = full.rsplit('/').next().unwrap_or(full);
    [port, full, name].contains(&service)
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

#[cfg(test)]
mod tests {
    use super::is_of;

    #[test]
    fn a_backend_is_found_by_every_name_of_its_services() {
        for service in ["web", "default/web", "default/web:http"] {
            assert!(is_of("default/web:http/TCP", service), "{service}");
        }
        for service in ["we", "default", "http", "default/web:htt", "default/web:http/TCP", "other/web"] {
            assert!(!is_of("default/web:http/TCP", service), "{service}");
        }
        assert!(is_of("default/web/UDP", "default/web") && is_of("#3/TCP", "#3"));
    }
}
