//! `sluice explain`: what would become of a packet, and why.

use clap::Args;

use super::{Failure, output::Target};
use crate::explain::{Answer, Client, Destination, Origin, Question, explain};

/// What to explain.
#[derive(Debug, Args)]
#[command(
    after_help = "Nothing is changed by asking: no connection is opened, nothing is counted, nobody's turn is taken. No agent need run.\n\nExamples:\n  sluice explain 10.244.1.5 10.96.0.10:80/tcp\n  sluice explain 10.244.1.5:40312 10.96.0.10:53/udp     # that very connection\n  sluice explain 198.51.100.7 192.0.2.1:30080 --from uplink\n  sluice explain fd00::5 '[fd00:96::a]:443/tcp' -o json | jq .backend"
)]
pub(super) struct Arguments {
    /// Who sends: ADDRESS, or ADDRESS:PORT for one connection.
    #[arg(value_name = "CLIENT")]
    client: Client,
    /// To whom: ADDRESS:PORT/PROTOCOL, with tcp, udp or sctp.
    #[arg(value_name = "DESTINATION")]
    destination: Destination,
    /// Where the packet comes from.
    #[arg(long, value_enum, value_name = "WHERE", default_value_t)]
    from: Origin,
    /// The device that it comes by, if the node's routes do not tell.
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { client, destination, from, device, target } = arguments;
    let question =
        Question::new(*client, *destination, *from, device.clone()).map_err(|error| Failure::new(error, 2))?;
    target.warn_of_another_network();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let answer = runtime.block_on(explain(&target.pin_path, &question)).map_err(|error| {
        let code = error.exit_code();
        Failure::new(error, code)
    })?;
    target.show(&answer, Answer::text)
}
