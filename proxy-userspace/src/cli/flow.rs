//! `sluice flow`: connections that are translated.

use std::net::IpAddr;

use clap::{Args, Subcommand, ValueEnum};
use ipnet::{AddrParseError, IpNet};
use proxy_common::addr;

use super::{
    EX_NOT_FOUND, Failure,
    output::{Target, ago, columns},
};
use crate::{
    explain::{Client, Destination},
    inspect::{Flow, FlowFilter},
};

/// What to do with flows.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// One line for each connection, the latest first.
    #[command(
        after_help = "Examples:\n  sluice flow list --service default/web\n  sluice flow list --address 10.244.1.0/24 --protocol udp\n  sluice flow list --stale -o json"
    )]
    List(List),
    /// Everything the kernel holds of one connection: where its packets are changed, into what, and what is known of it.
    #[command(
        after_help = "Exit status 3 means that there is no such connection.\n\nExamples:\n  sluice flow get 10.244.1.5:40312 10.96.0.10:80\n  sluice flow get '[fd00::5]:40312' '[fd00:96::a]:53/udp' -o json"
    )]
    Get(Get),
    /// Forget connections. What comes next of one is given a backend like any other, which breaks a TCP connection unless it is
    /// given the same one.
    #[command(
        after_help = "Examples:\n  sluice flow flush --address 10.244.1.7 --protocol udp\n  sluice flow flush --stale\n  sluice flow flush --all"
    )]
    Flush(Flush),
}

#[derive(Debug, Args)]
struct Filter {
    /// Of a Service: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    /// With an end in a network, or at an address, before or after translation.
    #[arg(short, long, value_name = "NETWORK", value_parser = network)]
    address: Option<IpNet>,
    /// With that port at one end.
    #[arg(short, long, value_name = "PORT")]
    port: Option<u16>,
    /// Of a protocol.
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// Whose backend does not serve any more.
    #[arg(long)]
    stale: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    filter: Filter,
    /// Every entry: replies, and the second steps of masqueraded flows, too.
    #[arg(long)]
    halves: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct Get {
    /// Who has opened it: ADDRESS:PORT.
    #[arg(value_name = "CLIENT")]
    client: Client,
    /// To whom: ADDRESS:PORT/PROTOCOL, with tcp, udp or sctp.
    #[arg(value_name = "DESTINATION")]
    destination: Destination,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct Flush {
    #[command(flatten)]
    filter: Filter,
    /// Every one.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    target: Target,
}

impl From<Protocol> for addr::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Sctp => Self::Sctp,
        }
    }
}

/// An address is a network of one.
pub(super) fn network(text: &str) -> Result<IpNet, AddrParseError> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => text.parse(),
    }
}

impl Filter {
    fn filter(&self, halves: bool) -> FlowFilter {
        FlowFilter {
            service: self.service.clone(),
            address: self.address,
            port: self.port,
            protocol: self.protocol.map(Into::into),
            stale: self.stale,
            halves,
        }
    }
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    match &arguments.verb {
        Verb::List(List { filter, halves, target }) => {
            let filter = filter.filter(*halves);
            let nothing = if filter.is_all() { "No flow is known." } else { "No flow that is known fits." };
            let flows = target.inspector()?.flows(&filter)?;
            target.show(&flows, |flows| list(flows, nothing))
        }
        Verb::Get(get) => get.execute(),
        Verb::Flush(flush) => flush.execute(),
    }
}

impl Get {
    fn execute(&self) -> Result<(), Failure> {
        let (destination, protocol) = (self.destination.socket(), self.destination.protocol());
        let client = self.client.socket().ok_or_else(|| {
            let advice =
                "the client's port is missing: `sluice flow list --address` shows all connections of an address";
            Failure::new(anyhow::anyhow!(advice), 2)
        })?;
        let flows = self.target.inspector()?.connection(protocol, client, destination)?;
        if flows.is_empty() {
            let error = anyhow::anyhow!(
                "the kernel knows no {protocol} connection from {client} to {destination}: `sluice explain` tells what would become of its next packet"
            );
            return Err(Failure::new(error, EX_NOT_FOUND));
        }
        self.target.show(&flows, |flows| describe(flows))
    }
}

impl Flush {
    fn execute(&self) -> Result<(), Failure> {
        let filter = self.filter.filter(true);
        if filter.is_all() != self.all {
            let error =
                anyhow::anyhow!("say which flows: by --service, --address, --port, --protocol or --stale; or --all");
            return Err(Failure::new(error, 2));
        }
        let removed = self.target.inspector()?.flush(&filter)?;
        self.target.show(&serde_json::json!({ "removed_entries": removed }), |_| format!("{removed} entries are out"))
    }
}

fn list(flows: &[Flow], nothing: &str) -> String {
    let headings = ["PROTOCOL", "CLIENT", "DESTINATION", "BECOMES", "SERVICE", "AT", "PHASE", "IDLE"];
    let row = |flow: &Flow| {
        // The source matters where it is replaced.
        let source = if flow.new_source == flow.client { String::new() } else { format!("{} ", flow.new_source) };
        [
            flow.protocol.clone(),
            flow.client.to_string(),
            flow.destination.to_string(),
            format!("{source}> {}", flow.new_destination),
            flow.service.to_string(),
            flow.stage.to_owned(),
            phase(flow),
            ago(flow.idle_seconds.into()),
        ]
    };
    columns(&headings, flows.iter().map(row), nothing)
}

/// A paragraph for each entry.
fn describe(flows: &[Flow]) -> String {
    let paragraph = |flow: &Flow| {
        format!(
            "{} {} > {}   at {}, {}\n  becomes {} > {}, and {}\n  {}   backend {}, {}\n  {}, last packet {} ago\n",
            flow.protocol,
            flow.client,
            flow.destination,
            flow.stage,
            flow.direction,
            flow.new_source,
            flow.new_destination,
            way(flow.output),
            flow.service,
            flow.backend,
            flow.backend_state.name(),
            phase(flow),
            ago(flow.idle_seconds.into()),
        )
    };
    flows.iter().map(paragraph).collect::<Vec<_>>().join("\n")
}

/// An output, in words.
fn way(output: &str) -> &'static str {
    match output {
        "forward" => "goes to the next device at once",
        "hairpin" => "goes back by the device that it came by",
        "dispatch" => "goes to the backend's node, which answers",
        "tunnel" => "goes to the backend's node in a tunnel",
        _ => "goes on through the kernel",
    }
}

fn phase(flow: &Flow) -> String {
    match flow.phase {
        phase if flow.goes_on => phase.to_owned(),
        // Nobody has ended it: it was silent for too long.
        phase @ ("opening" | "established") => format!("{phase}, timed out"),
        phase => format!("{phase}, over"),
    }
}

#[cfg(test)]
mod tests {
    use super::network;

    #[test]
    fn an_address_is_a_network_of_one() {
        assert_eq!(network("192.0.2.1").unwrap().to_string(), "192.0.2.1/32");
        assert_eq!(network("2001:db8::/32").unwrap().to_string(), "2001:db8::/32");
        assert!(network("192.0.2").is_err());
    }
}
