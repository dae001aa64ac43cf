//! The kernel's own table of connections (`nf_conntrack`): those whose destination something has translated, kube-proxy's rules
//! first of all. Out of the network namespace of the calling thread.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple},
};
use proxy_common::addr::Protocol;
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_NETFILTER,
};
use tokio::sync::{mpsc, watch};

use super::exchange::Exchange;
use crate::supervise;

/// There as soon as the kernel keeps such a table in the network namespace. To ask for the table itself would have it load the
/// module.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Between two looks, at least; a look at a large table is followed by a pause that is as many times as long as it took.
const PAUSE: (Duration, u32) = (Duration::from_secs(5), 20);

/// A connection whose destination is translated, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TranslatedConnection {
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Who has opened it.
    pub client: SocketAddr,
    /// Whom it is addressed to.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// Whom that one answers: the client, or the address and port that the client is masqueraded by.
    pub answered: SocketAddr,
}

/// Every one of them. None where the kernel has no such table.
pub fn translated() -> io::Result<BTreeSet<TranslatedConnection>> {
    let mut found = BTreeSet::new();
    if fs::read_to_string(COUNT).map_or(true, |count| count.trim() == "0") {
        return Ok(found);
    }
    let exchange = Exchange::open(NETLINK_NETFILTER)?;
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let request = NetfilterMessage::new(header, ConntrackMessage::Get(Vec::new()));
    exchange.send(NLM_F_REQUEST | NLM_F_DUMP, request)?;
    exchange.receive::<NetfilterMessage>(|message| {
        if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &message.inner {
            found.extend(connection(attributes));
        }
    })?;
    Ok(found)
}

/// Looks again and again while that is wanted, until the receiver is dropped. Must be called in a tokio runtime.
pub fn watch_translated(wanted: watch::Receiver<bool>) -> mpsc::Receiver<BTreeSet<TranslatedConnection>> {
    let (sender, receiver) = mpsc::channel(1);
    supervise::spawn("the watch of connections that others translate", move || follow(wanted.clone(), sender.clone()));
    receiver
}

async fn follow(mut wanted: watch::Receiver<bool>, sender: mpsc::Sender<BTreeSet<TranslatedConnection>>) {
    let mut pause = PAUSE.0;
    while wanted.wait_for(|is_wanted| *is_wanted).await.is_ok() {
        // Not at once: what was left to others a moment ago may not stand in the table yet.
        tokio::time::sleep(pause).await;
        let began = Instant::now();
        match tokio::task::spawn_blocking(translated).await {
            Ok(Ok(found)) => {
                if sender.send(found).await.is_err() {
                    return;
                }
            }
            Ok(Err(error)) => tracing::warn!("the kernel's table of connections cannot be read: {error}"),
            // It was ended, as the process is.
            Err(_) => return,
        }
        pause = PAUSE.0.max(began.elapsed().saturating_mul(PAUSE.1));
    }
    // Nobody will want it any more.
    sender.closed().await;
}

/// The connection of an entry, if it is of a protocol of ours and answers come from somebody else than it is addressed to.
fn connection(attributes: &[ConntrackAttribute]) -> Option<TranslatedConnection> {
    let (mut original, mut reply) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = ends(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = ends(tuple),
            _ => {}
        }
    }
    let (protocol, client, frontend) = original?;
    let (_, backend, answered) = reply?;
    (backend != frontend).then_some(TranslatedConnection { protocol, client, frontend, backend, answered })
}

/// Protocol, source and destination of a direction.
fn ends(tuple: &[Tuple]) -> Option<(Protocol, SocketAddr, SocketAddr)> {
    let (mut addresses, mut ports, mut protocol) = ([None::<IpAddr>; 2], [None; 2], None);
    for part in tuple {
        match part {
            Tuple::Ip(fields) => {
                for field in fields {
                    match field {
                        IPTuple::SourceAddress(address) => addresses[0] = Some(*address),
                        IPTuple::DestinationAddress(address) => addresses[1] = Some(*address),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(fields) => {
                for field in fields {
                    match field {
                        ProtoTuple::Protocol(number) => protocol = of_ours(u8::from(*number)),
                        ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                        ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let end = |index: usize| Some(SocketAddr::new((*addresses.get(index)?)?, (*ports.get(index)?)?));
    Some((protocol?, end(0)?, end(1)?))
}

fn of_ours(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| *protocol as u8 == number)
}

#[cfg(test)]
mod tests {
    use netlink_packet_netfilter::conntrack::{ConntrackAttribute, IPTuple, ProtoTuple, Protocol as Number, Tuple};
    use proxy_common::addr::Protocol;

    use super::{TranslatedConnection, connection};

    fn tuple(protocol: Number, source: &str, destination: &str) -> Vec<Tuple> {
        let (source, destination): (std::net::SocketAddr, std::net::SocketAddr) =
            (source.parse().unwrap(), destination.parse().unwrap());
        vec![
            Tuple::Ip(vec![IPTuple::SourceAddress(source.ip()), IPTuple::DestinationAddress(destination.ip())]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(protocol),
                ProtoTuple::SourcePort(source.port()),
                ProtoTuple::DestinationPort(destination.port()),
            ]),
        ]
    }

    fn entry(protocol: Number, original: [&str; 2], reply: [&str; 2]) -> Vec<ConntrackAttribute> {
        vec![
            ConntrackAttribute::CtaTupleOrig(tuple(protocol, original[0], original[1])),
            ConntrackAttribute::CtaTupleReply(tuple(protocol, reply[0], reply[1])),
        ]
    }

    #[test]
    fn whose_answers_come_from_somebody_else_is_translated() {
        let client = "10.244.1.5:4000";
        let found = connection(&entry(Number::Tcp, [client, "10.96.0.1:80"], ["10.244.2.5:8080", client]));
        let expected = TranslatedConnection {
            protocol: Protocol::Tcp,
            client: client.parse().unwrap(),
            frontend: "10.96.0.1:80".parse().unwrap(),
            backend: "10.244.2.5:8080".parse().unwrap(),
            answered: client.parse().unwrap(),
        };
        assert_eq!(found, Some(expected));
        // Another port of the same host is somebody else; a masqueraded client changes nothing.
        let found =
            connection(&entry(Number::Udp, ["[fd00::5]:4000", "[fd00::1]:53"], ["[fd00::1]:5353", "[fd00::9]:7"]));
        assert_eq!(found.map(|found| found.protocol), Some(Protocol::Udp));
    }

    #[test]
    fn what_is_masqueraded_alone_or_of_another_protocol_is_not() {
        let client = "10.244.1.5:4000";
        assert_eq!(connection(&entry(Number::Tcp, [client, "1.1.1.1:80"], ["1.1.1.1:80", "192.0.2.1:4000"])), None);
        assert_eq!(connection(&entry(Number::Icmp, [client, "10.96.0.1:80"], ["10.244.2.5:80", client])), None);
        assert_eq!(connection(&[]), None);
    }
}
