//! `sluice service`: what is served.

use std::fmt::Write as _;

use clap::{Args, Subcommand};

use super::{
    EX_NOT_FOUND, Failure,
    output::{Target, columns},
};
use crate::inspect::{Empty, Frontend, Kind, Range, ServicePort};

/// What to show of Services.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// One line for each port of each Service.
    #[command(after_help = "Examples:\n  sluice service list\n  sluice service list --namespace default -o json")]
    List(List),
    /// Everything the kernel holds of a Service.
    #[command(after_help = "Examples:\n  sluice service get default/kubernetes\n  sluice service get web -o yaml")]
    Get(Get),
}

#[derive(Debug, Args)]
struct List {
    /// Only those of a namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct Get {
    /// NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    name: String,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    match &arguments.verb {
        Verb::List(list) => list.execute(),
        Verb::Get(get) => get.execute(),
    }
}

impl List {
    fn execute(&self) -> Result<(), Failure> {
        let mut ports = self.target.inspector()?.services()?;
        if let Some(namespace) = &self.namespace {
            ports.retain(|port| port.name.namespace == *namespace);
        }
        self.target.show(&ports, |ports| match &self.namespace {
            Some(namespace) if ports.is_empty() => format!("The kernel has no Service of the namespace {namespace}."),
            _ => list(ports),
        })
    }
}

impl Get {
    fn execute(&self) -> Result<(), Failure> {
        let mut ports = self.target.inspector()?.services()?;
        ports.retain(|port| port.name.is_called(&self.name));
        if ports.is_empty() {
            let error =
                anyhow::anyhow!("the kernel has no Service {}: `sluice service list` names those it has", self.name);
            return Err(Failure::new(error, EX_NOT_FOUND));
        }
        self.target.show(&ports, |ports| ports.iter().map(describe).collect::<Vec<_>>().join("\n"))
    }
}

fn list(ports: &[ServicePort]) -> String {
    let headings = ["SERVICE", "PROTOCOL", "FRONTENDS", "BACKENDS", "ALGORITHM", "AFFINITY"];
    let row = |port: &ServicePort| {
        [
            port.name.to_string(),
            port.protocol.clone(),
            port.frontends.iter().map(short).collect::<Vec<_>>().join(" "),
            port.backends().len().to_string(),
            port.algorithm.to_owned(),
            affinity(port),
        ]
    };
    columns(&headings, ports.iter().map(row), "The kernel has no Service.")
}

fn affinity(port: &ServicePort) -> String {
    port.affinity_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s"))
}

fn short(frontend: &Frontend) -> String {
    match frontend.kind {
        Kind::NodePort => format!("node:{}", frontend.port),
        Kind::ClusterIp | Kind::External => std::net::SocketAddr::new(frontend.address, frontend.port).to_string(),
    }
}

fn describe(port: &ServicePort) -> String {
    let mut text = format!(
        "{} {}   index {}   {}   affinity {}\n",
        port.name,
        port.protocol,
        port.index,
        port.algorithm,
        affinity(port)
    );
    for frontend in &port.frontends {
        let _ = writeln!(text, "  {}{}", short(frontend), remarks(frontend));
        if frontend.internal == frontend.external {
            text += &range("all clients", &frontend.internal);
        } else {
            text += &range("pods and processes of this node", &frontend.internal);
            text += &range("clients outside", &frontend.external);
        }
    }
    text
}

fn remarks(frontend: &Frontend) -> String {
    let remarks = [
        (frontend.kind == Kind::External, "external address"),
        (frontend.keeps_source, "keeps the client's address"),
        (frontend.has_source_ranges, "for some clients only"),
        (frontend.is_dispatched, "answered by the backend's node"),
        (frontend.is_crossed, "backends of the other family"),
    ];
    let remarks: Vec<&str> = remarks.into_iter().filter(|(is_so, _)| *is_so).map(|(_, remark)| remark).collect();
    if remarks.is_empty() { String::new() } else { format!("   ({})", remarks.join(", ")) }
}

fn range(clients: &str, range: &Range) -> String {
    if range.backends.is_empty() {
        let told = match range.when_empty {
            Empty::Reject => "nobody serves: they are told so",
            Empty::Drop => "nobody serves here, and the policy is Local: their packets are dropped",
        };
        return format!("    {clients}: {told}\n");
    }
    let mut text = format!("    {clients}:\n");
    for share in &range.backends {
        let percent = f64::from(share.slots) * 100.0 / f64::from(range.slots.max(1));
        let _ = writeln!(text, "      {}   {}   {percent:.1} %", share.address, share.state.name());
    }
    text
}
